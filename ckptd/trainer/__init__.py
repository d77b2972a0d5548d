"""What runs in the user's training process. The only part of ckptd that imports torch."""
