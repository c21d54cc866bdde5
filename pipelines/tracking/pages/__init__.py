"""What MLflow's pages show beside metrics: data, arms, checkpoints, descriptions, machines."""
