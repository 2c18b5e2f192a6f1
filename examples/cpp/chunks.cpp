// The chunk logic on a script of plans and ticks on the standard input; prints every tick's step and action.
// Lines: `grid To T A STRIDE`, `latest` or `temporal_ensemble DECAY`, `hold TICKS` or `stop`, and then
// `plan TICK NOW ACTIONS…` and `tick NOW`.
#include <iostream>
#include <paradiffpolicy/chunks.hpp>
#include <string>

int main() {
  using namespace paradiffpolicy;
  std::string word;
  Grid grid{};
  std::cin >> word >> grid.n_obs_steps >> grid.horizon >> grid.action_dim >> grid.stride >> word;
  std::unique_ptr<Blending> blending = std::make_unique<Latest>(grid);
  if (double decay; word == "temporal_ensemble" && std::cin >> decay) {
    blending = std::make_unique<TemporalEnsemble>(grid, decay);
  }
  double timeout = 0;
  std::cin >> word;
  const Fallback fallback = word == "hold" ? Fallback::hold : Fallback::stop;
  if (fallback == Fallback::hold) std::cin >> timeout;
  ChunkPlayer player(std::move(blending), fallback, timeout);
  std::cout.precision(17);
  for (Tick tick, now; std::cin >> word >> tick;) {
    if (word == "plan") {
      Chunk chunk{tick, std::vector<double>(grid.horizon * grid.action_dim)};
      std::cin >> now;
      for (double& value : chunk.actions) std::cin >> value;
      player.arrived(std::move(chunk), now);
    } else {
      const auto action = player.act(tick);
      std::cout << player.step();
      for (const double value : action.value_or(Action{})) std::cout << ' ' << value;
      std::cout << '\n';
    }
  }
}
