"""The trunk: the model's middle blocks on a server, which computes for many silos at once."""
