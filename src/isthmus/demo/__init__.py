"""The demo: four silos that fine-tune a small public model on public text."""
