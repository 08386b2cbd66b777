"""Where the figures of a training run go besides its own files: TensorBoard, wandb, MLflow."""
