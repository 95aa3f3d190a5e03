"""The ClientApp: Flower starts it for a message, and it hands the message to the silo that lives on."""

from __future__ import annotations

import flwr
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from .contents import content_of, letter_in
from .delivery import check_version, hand_over

client = ClientApp()


@client.train()
def answer_letter(message: Message, context: Context) -> Message:
    """The silo's answer to a message of the root."""
    check_version(flwr.__version__)
    return Message(content_of(hand_over(letter_in(message.content), context.node_config)), reply_to=message)
