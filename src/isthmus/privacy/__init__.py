"""What leaves a silo, secured and accounted."""
