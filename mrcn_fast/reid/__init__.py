"""Visible-infrared person re-identification on top of the MRCN block: data, models, training, scores."""
