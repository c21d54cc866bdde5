"""The science of MANTiS: model, bitstream, losses, training loop. Knows no Ray, no MLflow."""
