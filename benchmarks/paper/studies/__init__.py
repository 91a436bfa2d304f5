"""The study of the meta-update: ways of learning A, B and S, by loss against steps and against time."""
