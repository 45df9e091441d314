"""A result pushed to the hub, with its model card.

Order: licences, card_facts, edited_card, model_card, retry, account, upload, push.
"""
