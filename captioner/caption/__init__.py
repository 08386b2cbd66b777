"""The caption job: images in, Parquet out."""
