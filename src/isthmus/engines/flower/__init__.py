"""The Flower engine: silos and root exchange their frames in Flower's messages.

``isthmus flower`` writes a Flower app that is a courier and knows nothing else (``courier``). Root and silos are
ordinary processes of isthmus that stay alive between messages. Each listens at a socket of its machine, to which the
app's processes, which Flower starts anew for every message, bring what came. Between the two the bytes are those of one
TLS connection from the silo's key to the root's (``secured``): SuperLink and SuperNodes carry what they cannot read.
"""
