"""Images inside Parquet files: which column holds them, listing, reading."""
