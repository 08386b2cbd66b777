"""captioner: train an image captioner, caption image folders and buckets into Parquet."""

__version__ = "0.1.0"
