"""The wire: frames, codecs, and the channels and servers that carry them over gRPC with mTLS."""
