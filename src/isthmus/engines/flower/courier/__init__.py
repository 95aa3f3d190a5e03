"""The Flower app. ``isthmus flower`` copies these files; they run where flwr is installed, and import no isthmus."""
