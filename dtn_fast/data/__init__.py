"""Files to training data: manifests, video decoding, face crops, shards, augmentation, the synthetic demo set."""
