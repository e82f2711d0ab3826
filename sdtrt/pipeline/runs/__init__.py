"""From an open pipeline to pictures and their files: its calls, the passes behind them, what a file says."""
