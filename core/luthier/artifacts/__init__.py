"""What is inside an artifact: datasets as Parquet, model folders, safetensors headers. No torch."""
