"""The ClientApp behind `flwr run .`, found here rather than where it is written.

Flower's engine looks for the two apps in two threads at once, and looking for a module imports the package around it.
This package imports nothing heavy; `fedlotr.flower` does, and two threads that import peft at once can break it.
"""

from fedlotr.flower import client_app

app = client_app.app
