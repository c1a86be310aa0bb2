"""Ingest to MDS shards, the domain catalogue, the mixture sampler and the loader."""
