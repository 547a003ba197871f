"""Training: from batches to checkpoints.

trainer.py is the loop. config.py has all values of a run, and the schedule of the learning rate. batches.py
makes paired batches, losses.py the total loss, optimizer.py the optimizer, and transfers.py the copies to and
from a GPU. checkpoint.py writes and checks checkpoint.pth, journal.py writes metrics.jsonl, and run_folder.py
locks the folder. pretraining.py pretrains on synthetic people, for the demo and the study.
"""
