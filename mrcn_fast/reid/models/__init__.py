"""The network: two stems, a shared ResNet with MRCN or SNR blocks in it, pooling, BNNecks and classifiers."""
