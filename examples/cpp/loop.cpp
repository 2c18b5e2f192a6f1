// A control loop that plans beside itself: `loop FOLDER` runs 30 ticks at the policy's rate.  Put your robot in
// place of observe() and apply().
#include <chrono>
#include <future>
#include <iostream>
#include <paradiffpolicy/chunks.hpp>
#include <paradiffpolicy/policy.hpp>
#include <thread>

using namespace paradiffpolicy;

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: loop FOLDER\n", 2;
  Policy policy(argv[1]);
  const Spec& spec = policy.spec();
  const auto observe = [&] { return std::vector<float>(spec.obs_dim, 200.0F); };
  const auto apply = [](const Action* action) {
    if (action == nullptr) std::cout << "stop\n";
    for (const double value : action == nullptr ? Action{} : *action) std::cout << value << ' ';
    std::cout << std::endl;
  };

  const Grid grid{Tick(spec.n_obs_steps), Tick(spec.horizon), Tick(spec.action_dim), 1};
  const Fallback fallback = spec.repeating_holds_still ? Fallback::hold : Fallback::stop;
  ChunkPlayer player(std::make_unique<Latest>(grid), fallback, 2 * spec.control_hz);
  std::deque<std::vector<float>> history(spec.n_obs_steps, observe());
  std::future<std::vector<float>> planned;
  Tick made_for = 0, due = 0;

  const auto start = std::chrono::steady_clock::now();
  for (Tick tick = 0; tick < 30; ++tick) {
    std::this_thread::sleep_until(start + std::chrono::duration<double>(tick / spec.control_hz));
    history.pop_front();
    history.push_back(observe());
    if (planned.valid() && planned.wait_for(std::chrono::seconds(0)) == std::future_status::ready) {
      try {
        const std::vector<float> actions = planned.get();
        player.arrived({made_for, {actions.begin(), actions.end()}}, tick);
      } catch (const std::exception& error) {  // the old plan goes on, then the fallback acts
        std::cerr << error.what() << '\n';
        due = tick;
      }
    }
    if (!planned.valid() && tick >= due) {  // every Ta ticks, or as soon as the planner is free
      std::vector<float> window;
      for (const auto& observation : history) window.insert(window.end(), observation.begin(), observation.end());
      const Tick executed = player.steps_before(tick) - player.steps_before(made_for);
      planned = std::async(std::launch::async, [&policy, window, executed] { return policy.plan(window, executed); });
      made_for = tick;
      due = tick + Tick(spec.n_action_steps);
    }
    const std::optional<Action> action = player.act(tick);
    apply(action ? &*action : nullptr);
  }
}
