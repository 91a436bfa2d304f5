"""Steps of φ down the meta-gradient."""
