"""A character-level language model whose recurrent layer lives on a timernn server."""
