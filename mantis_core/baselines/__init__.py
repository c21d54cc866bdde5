"""What MANTiS is only compared with."""
