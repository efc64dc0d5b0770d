"""DINO: a student network learns to predict its own moving average, the teacher."""
