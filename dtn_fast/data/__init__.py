"""Data: dataset readers, video decoding, face crops, shard files, augmentation and the synthetic demo set."""
