"""Teachers: token ids enter, what the loss needs of every frozen teacher leaves."""
