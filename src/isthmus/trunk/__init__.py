"""The server side of the model: middle blocks that serve many silos."""
