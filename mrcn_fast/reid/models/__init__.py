"""The re-identification network.

network.py is the whole network, and `ModelOptions` its architecture. resnet.py is the ResNet with a stem per
modality, and loads ImageNet weights. blocks.py has the block that each network inserts between stages.
heads.py has the pooling into parts, the BNNeck and the classifier.
"""
