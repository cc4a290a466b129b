"""What every program of this project does before it imports anything else: importing this does it.

The process is tied to its launcher, and the threads of torch's libraries are told how to wait.
Standard library only.
"""

from pdn.runs.launcher import die_with_launcher

die_with_launcher()
