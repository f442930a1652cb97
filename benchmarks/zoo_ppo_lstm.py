"""The recurrent-PPO configurations of rl-baselines3-zoo as command lines of the tutorial.

    python -m benchmarks.zoo_ppo_lstm                                  # list them
    python -m benchmarks.zoo_ppo_lstm LunarLanderNoVel --seed 3 --output runs/lunar

Source: hyperparams/ppo_lstm.yml of https://github.com/DLR-RM/rl-baselines3-zoo, commit 038ab16,
where an environment of Gymnasium has taken the place of an older version. What a configuration
leaves open has the default of sb3-contrib's ``RecurrentPPO``. Minibatches there are cut from the
flattened rollout; here they hold whole sequences of ``--seq-len`` steps.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tutorials" / "recurrent_ppo.py"

DEFAULTS = (
    "--observation all --reward-scale 1 --cell lstm --critic recurrent --hidden-size 256 "
    "--net-arch 64 64 --activation tanh --ortho-init --no-squash --log-std-init 0 "
    "--num-envs 1 --steps 128 --seq-len 128 --minibatch-steps 128 --epochs 10 "
    "--gamma 0.99 --lmbda 0.95 --learning-rate 3e-4 --lr-schedule constant "
    "--clip 0.2 --clip-schedule constant --entropy 0 --critic-coeff 0.5 --max-grad-norm 0.5"
)
NORMALIZE = "--normalize-observation --normalize-reward"
LUNAR_LANDER = (
    "--num-envs 16 --frames 1000000 --steps 1024 --seq-len 64 --minibatch-steps 64 "
    "--lmbda 0.98 --gamma 0.999 --epochs 4 --entropy 0.01 --hide 2 3 5"
)
BIPEDAL_WALKER = (
    f"{NORMALIZE} --num-envs 16 --seq-len 64 --minibatch-steps 64 --entropy 0.001 "
    "--learning-rate 2.5e-4"
)
MUJOCO = (
    f"{NORMALIZE} --frames 1000000 --steps 512 --seq-len 32 --minibatch-steps 32 "
    "--log-std-init -2 --no-ortho-init --activation relu --net-arch 256 256"
)
ATARI_WRAPPERS = (
    "gymnasium.wrappers:AtariPreprocessing(terminal_on_life_loss=False)",
    "gymnasium.wrappers:ClipReward(min_reward=-1,max_reward=1)",
)
CAR_RACING_WRAPPERS = (
    "gymnasium.wrappers:RepeatAction(num_repeats=2)",
    "gymnasium.wrappers:ResizeObservation(shape=(64,64))",
    "gymnasium.wrappers:GrayscaleObservation(keep_dim=True)",
)

CONFIGURATIONS = {
    "atari": (
        "--env ale_py:ALE/Breakout-v5(frameskip=1) --frame-stack 4 --net-arch --num-envs 8 "
        "--steps 128 --epochs 4 --minibatch-steps 256 --frames 10000000 --learning-rate 2.5e-4 "
        "--lr-schedule linear --clip 0.1 --clip-schedule linear --entropy 0.01 "
        f"--wrappers {' '.join(ATARI_WRAPPERS)}"
    ),
    "PendulumNoVel": (
        "--env Pendulum-v1 --hide 2 --num-envs 4 --frames 100000 --steps 1024 --gamma 0.9 "
        "--learning-rate 1e-3 --sde --sde-sample-freq 4"
    ),
    "CartPoleNoVel": (
        "--env CartPole-v1 --hide 1 3 --num-envs 8 --frames 100000 --steps 32 --seq-len 32 "
        "--minibatch-steps 256 --lmbda 0.8 --gamma 0.98 --epochs 20 --learning-rate 0.001 "
        "--lr-schedule linear --clip-schedule linear"
    ),
    "MountainCarNoVel": (
        f"--env MountainCar-v0 --hide 1 {NORMALIZE} --num-envs 16 --frames 1000000 --steps 16 "
        "--seq-len 16 --lmbda 0.98 --epochs 4"
    ),
    "MountainCarContinuousNoVel": (
        f"--env MountainCarContinuous-v0 --hide 1 {NORMALIZE} --frames 20000 --steps 8 "
        "--seq-len 8 --minibatch-steps 256 --gamma 0.9999 --learning-rate 7.77e-5 "
        "--entropy 0.00429 --clip 0.1 --lmbda 0.9 --max-grad-norm 5 --critic-coeff 0.19 --sde "
        "--log-std-init -3.29 --no-ortho-init"
    ),
    "Acrobot": (
        f"--env Acrobot-v1 {NORMALIZE} --num-envs 16 --frames 1000000 --steps 256 --lmbda 0.94 "
        "--epochs 4"
    ),
    "BipedalWalker": f"--env BipedalWalker-v3 {BIPEDAL_WALKER} --frames 5000000 --steps 2048",
    "BipedalWalkerHardcore": (
        f"--env BipedalWalkerHardcore-v3 {BIPEDAL_WALKER} --frames 100000000 --steps 512 "
        "--lr-schedule linear --clip-schedule linear --critic feed_forward"
    ),
    "LunarLanderNoVel": f"--env LunarLander-v3 {LUNAR_LANDER}",
    "LunarLanderContinuousNoVel": f"--env LunarLander-v3(continuous=True) {LUNAR_LANDER}",
    "CarRacing": (
        "--env CarRacing-v3 --frame-stack 2 --net-arch --num-envs 8 --frames 2000000 "
        "--steps 512 --lmbda 0.9 --epochs 20 --sde --sde-sample-freq 4 --learning-rate 3e-5 "
        "--clip 0.4 --log-std-init -2 --no-ortho-init --critic feed_forward --activation gelu "
        f"--hidden-size 128 --wrappers {' '.join(CAR_RACING_WRAPPERS)}"
    ),
    "Swimmer": f"--env Swimmer-v5 {NORMALIZE} --frames 1000000 --gamma 0.9999",
    "HalfCheetah": (
        f"--env HalfCheetah-v5 {MUJOCO} --seq-len 64 --minibatch-steps 64 --gamma 0.98 "
        "--learning-rate 2.0633e-5 --entropy 0.000401762 --clip 0.1 --epochs 20 --lmbda 0.92 "
        "--max-grad-norm 0.8 --critic-coeff 0.58096"
    ),
    "Hopper": (
        f"--env Hopper-v5 {MUJOCO} --gamma 0.999 --learning-rate 9.80828e-5 --entropy 0.00229519 "
        "--epochs 5 --lmbda 0.99 --max-grad-norm 0.7 --critic-coeff 0.835671"
    ),
    "HumanoidStandup": (
        f"--env HumanoidStandup-v5 {MUJOCO} --frames 10000000 --learning-rate 2.55673e-5 "
        "--entropy 3.62109e-6 --clip 0.3 --epochs 20 --lmbda 0.9 --max-grad-norm 0.7 "
        "--critic-coeff 0.430793"
    ),
    "Humanoid": (
        f"--env Humanoid-v5 {MUJOCO} --frames 10000000 --seq-len 256 --minibatch-steps 256 "
        "--gamma 0.95 --learning-rate 3.56987e-5 --entropy 0.00238306 --clip 0.3 --epochs 5 "
        "--lmbda 0.9 --max-grad-norm 2 --critic-coeff 0.431892"
    ),
    "InvertedDoublePendulum": (
        f"--env InvertedDoublePendulum-v5 {NORMALIZE} --frames 1000000 --minibatch-steps 512 "
        "--gamma 0.98 --learning-rate 0.000155454 --entropy 1.05057e-6 --clip 0.4 --lmbda 0.8 "
        "--critic-coeff 0.695929"
    ),
    "InvertedPendulum": (
        f"--env InvertedPendulum-v5 {NORMALIZE} --frames 1000000 --steps 32 --seq-len 32 "
        "--minibatch-steps 64 --gamma 0.999 --learning-rate 0.000222425 --entropy 1.37976e-7 "
        "--clip 0.4 --epochs 5 --lmbda 0.9 --max-grad-norm 0.3 --critic-coeff 0.19816"
    ),
    "Reacher": (
        f"--env Reacher-v5 {NORMALIZE} --frames 1000000 --steps 512 --seq-len 32 "
        "--minibatch-steps 32 --gamma 0.9 --learning-rate 0.000104019 --entropy 7.52585e-8 "
        "--clip 0.3 --epochs 5 --lmbda 1 --max-grad-norm 0.9 --critic-coeff 0.950368"
    ),
    "Walker2d": (
        f"--env Walker2d-v5 {NORMALIZE} --frames 1000000 --steps 512 --seq-len 32 "
        "--minibatch-steps 32 --learning-rate 5.05041e-5 --entropy 0.000585045 --clip 0.1 "
        "--epochs 20 --max-grad-norm 1 --critic-coeff 0.871923"
    ),
}


def command_line(name: str) -> list[str]:
    """Return the options of ``tutorials/recurrent_ppo.py`` for a configuration."""
    return [*DEFAULTS.split(), *CONFIGURATIONS[name].split()]


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in CONFIGURATIONS:
        print("Configurations:", *CONFIGURATIONS)
        return int(bool(argv))
    name, *options = argv
    return subprocess.call([sys.executable, str(SCRIPT), *command_line(name), *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
