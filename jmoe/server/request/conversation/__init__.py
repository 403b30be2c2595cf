"""Messages on their way to the chat template.

``results`` puts the results of calls after their calls; ``messages`` gives each message the form that the
template takes, and ``turns`` all of them an order that it takes. ``literals`` keeps control tokens that a
message spells plain text, ``final_message`` lets an answer go on where the last message ends.
``chat_model`` has what is known of the model since the start.
"""
