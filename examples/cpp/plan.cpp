// Plans for observation windows on the standard input: `plan FOLDER`, then per plan the number of steps executed
// since the one before, the window [batch, To, O] and the noise, as text; prints the actions [batch, T, A].
#include <iostream>
#include <paradiffpolicy/policy.hpp>

int main(int argc, char** argv) {
  if (argc != 2) return std::cerr << "usage: plan FOLDER\n", 2;
  paradiffpolicy::Policy policy(argv[1]);
  const paradiffpolicy::Spec& spec = policy.spec();
  std::vector<float> window(spec.batch * spec.n_obs_steps * spec.obs_dim);
  std::vector<float> x_T(spec.batch * spec.horizon * spec.action_dim);
  std::cout.precision(9);
  for (std::int64_t executed; std::cin >> executed;) {
    for (float& value : window) std::cin >> value;
    for (float& value : x_T) std::cin >> value;
    for (const float action : policy.plan(window, executed, {{"x_T", x_T}})) std::cout << action << ' ';
    std::cout << std::endl;
  }
}
