"""What DINO is: a student that learns from its own moving average."""
