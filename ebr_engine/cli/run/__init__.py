"""What happens when a command runs: work found and chosen, a model loaded, files restored, people told.

Commands import these; nothing here imports a command, and like them it imports nothing heavy at its top.
"""
