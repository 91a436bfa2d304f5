"""Many processes: replicas, shards, owners."""
