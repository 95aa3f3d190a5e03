"""isthmus beside FedSEA-LLaMA's own published code, which stays in the reader's checkout and an environment of its own.

Nothing of that code is in this repository: ``checkout`` starts it, ``inside`` runs within its processes.
"""
