"""The `ckptd` command: one file per verb; prints, decides nothing."""
