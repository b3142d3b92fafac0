"""What a configuration will need and cost, and what is odd about it, before anything runs. No torch here."""
