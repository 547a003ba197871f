"""The paper's tables and figures made anew: recipes, the runs they need, and the study of the CQC loss."""
