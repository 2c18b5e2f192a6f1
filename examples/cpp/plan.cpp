// Plans for observation windows on the standard input: `plan FOLDER`, then per plan the number of steps executed
// since the one before, the window [batch, To, O] and the noise x_T [batch, T, A] as text; prints the actions
// [batch, T, A].
#include <iostream>
#include <paradiffpolicy/policy.hpp>

std::vector<float> numbers(std::size_t count) {
  std::vector<float> values(count);
  std::string word;
  for (float& value : values) {
    if (!(std::cin >> word)) throw std::runtime_error("a number is missing");
    value = std::stof(word);
  }
  return values;
}

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: plan FOLDER");
  paradiffpolicy::Policy policy(argv[1]);
  const paradiffpolicy::Spec& spec = policy.spec();
  std::cout.precision(9);
  for (std::int64_t executed; std::cin >> executed;) {
    const auto window = numbers(spec.batch * spec.n_obs_steps * spec.obs_dim);
    const auto x_T = numbers(spec.batch * spec.horizon * spec.action_dim);
    for (const float action : policy.plan(window, executed, {{"x_T", x_T}})) std::cout << action << ' ';
    std::cout << std::endl;
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
