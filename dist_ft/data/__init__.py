"""From raw data to padded micro-batches: prepare, shards, order, loader."""
