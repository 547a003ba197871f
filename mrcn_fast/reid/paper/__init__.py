"""The paper's tables and figures, made again, and the study of the CQC loss.

command.py is `mrcn-fast table`, for which tables.py makes a table. recipes.py reads the recipes of its rows
from recipes/ and the table from recipes/tables/, runs.py trains and scores the rows, and made_tables.py
prints the result.
figures.py makes Figures 5 and 6, `mrcn-fast figures`, which plots.py computes and draws. study.py is
`mrcn-fast study`.
"""
