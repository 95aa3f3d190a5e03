"""Flower's FedAvg of LoRA adapters."""
