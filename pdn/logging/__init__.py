"""Where metrics go while a run trains: the progress line, wandb."""
