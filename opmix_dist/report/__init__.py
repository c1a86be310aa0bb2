"""What a run did, for people: terminal tables and a self-contained HTML page, from run directories only."""
