r"""The simulated arm as a robot of LeRobot's, and a keyboard that drives it: a plug-in that needs no installation.

    export PYTHONPATH=$PWD  # of the project, where LeRobot is installed
    sim=(--robot.discover_packages_path=so101_mujoco --robot.type=so101_mujoco)
    keys=(--teleop.discover_packages_path=so101_mujoco --teleop.type=so101_keyboard)
    pushes=(--play_sounds=false --dataset.repo_id=local/pushes --dataset.root=pushes)
    lerobot-teleoperate "${sim[@]}" "${keys[@]}" --fps=30 --robot.viewer=true  # a window, which needs a display
    lerobot-record "${sim[@]}" "${keys[@]}" "${pushes[@]}" --dataset.single_task="Slide the sheet of paper." \
        --dataset.num_episodes=10 --dataset.episode_time_s=20 --dataset.reset_time_s=5 \
        --dataset.push_to_hub=false --dataset.vcodec=h264  # of LeRobot 0.6: --dataset.rgb_encoder.vcodec=h264
    lerobot-replay "${sim[@]}" "${pushes[@]}" --dataset.episode=0 --robot.seed=0
    python act.py --dataset pushes

A leader arm drives it as it is: --teleop.type=so101_leader --teleop.port=/dev/ttyACM0 --teleop.id=mine.

Keys: of the terminal that the command was started in, which must have the focus, on Linux and macOS, with or without a
display, over SSH and in containers; not on Windows (but in WSL), and not without a terminal. A terminal tells that a
key repeats and not that it is let go: the finger stops about 0.15 s later. The targets start from the simulated arm's
home: this is no teleoperator for an arm on a desk, which would jump there. LeRobot's own keys end and discard episodes:
arrows and Escape, which 0.4 hears with a display only; without one, its episodes take their whole time.

Sheet: Backspace puts it back, and the arm home, as the episode of the next seed; so does, by any teleoperator, a
fingertip that was held above 15 cm for a second. Do that between episodes. The seeds are printed: `--robot.seed` gives
a replay the same one. Nothing puts the sheet back for a policy that lerobot-record plays: eval.py judges policies.

Dataset: `action`, joint targets; `observation.images.top`; `observation.state`, of 21 numbers, because LeRobot knows of
no other place: the measured joints, then the rows of `observation.environment_state`, which are where the sheet is
seen. `load_demos` takes them apart. A policy that LeRobot trains on all 21 is no base here; record_demos.py and
real_arm.py record for one. `--robot.sheet=false` leaves the rows out, for policies that see images, and then act.py
cannot use it. There are no rewards, and nothing says whether an episode succeeded.
"""
