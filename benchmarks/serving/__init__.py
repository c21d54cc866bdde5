"""The load benchmark of `mantis serve`: speed, hostile bodies, a killed replica, a moved alias."""
