export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PYTHONPATH
nvidia-smi --query-gpu=name --format=csv,noheader
run() { # seconds, name, options
  limit=$1; name=$2; config=$3; shift 3
  echo "=== $name"; date
  timeout -s TERM -k 15 $limit python -m train --gin_file configs/runs/$config.gin --gin.Train.log_every=50 --gin.Train.eval_every=100 --gin.Metrics.tensorboard=False --gin.Checkpoint.every_steps=100000 --workdir /tmp/runs/$name "$@" 2>&1 | grep -v -i warn | tail -60
}
run 80 a passkey_mamba1
run 55 b passkey_mamba1 --gin.Task.context_weight=0.0 --gin.Optimizer.learning_rate=1e-3
run 40 c passkey_mamba2
date
