// An exported policy on OpenVINO: observation window in, actions out, both in the robot's units.
// C++17, header only; needs OpenVINO's runtime and the folder that `paradiffpolicy export` wrote.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <openvino/openvino.hpp>

namespace paradiffpolicy {

// Numbers by the name of a model's input, row-major.
using Values = std::map<std::string, std::vector<float>>;

// What a policy's numbers are; To, Ta and T as in diffusion_policy: of a plan's T steps the first is for the
// oldest observation of the window, and steps To - 1 to To - 2 + Ta are for execution.
struct Spec {
  std::size_t batch, n_obs_steps, n_action_steps, horizon, obs_dim, action_dim;
  double control_hz;           // of a plan's steps
  bool repeating_holds_still;  // whether repeating an action holds the robot still
};

// Makes plans; each continues the one before, if the sampler does.  Not for several threads at once.
class Policy {
 public:
  // Reads and compiles the models of a folder; seconds.  `options` are OpenVINO's, as the number of threads.
  explicit Policy(const std::filesystem::path& folder, std::uint64_t seed = 0, ov::AnyMap options = {})
      : generator_(seed) {
    // Without the first, CPUs that multiply bfloat16 would compute in it.
    options.emplace(ov::hint::inference_precision(ov::element::f32));
    options.emplace(ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
    ov::Core core;
    const auto model = core.read_model((folder / "plan.xml").string());
    const auto window = model->input("observation").get_shape(), plan = model->output("actions").get_shape();
    const auto told = [&](const char* name) {
      return model->get_rt_info<std::string>("paradiffpolicy", name);
    };
    if (told("format") != "1") throw std::runtime_error("the folder is of another version: export it again");
    spec_ = {window[0], window[1], std::stoul(told("n_action_steps")), plan[1], window[2], plan[2],
             std::stod(told("control_hz")), told("repeating_holds_still") == "True"};
    cold_ = core.compile_model(model, "CPU", options).create_infer_request();
    const auto warm = folder / "plan_warm.xml";
    if (std::filesystem::exists(warm)) {
      warm_ = core.compile_model(warm.string(), "CPU", options).create_infer_request();
    }
  }

  const Spec& spec() const { return spec_; }

  // Forgets the last plan, as at the start of an episode.
  void reset() { state_.clear(); }

  // The plan [batch, T, A] for a window [batch, To, O], oldest observation first.  `executed`: how many steps
  // of the last plan have been executed since it was asked for, 0 to T; Ta unless given.  `noise`: standard
  // normal `x_T` and, where the model has it, `z`, and uniform `u`; drawn unless given.
  std::vector<float> plan(const std::vector<float>& window, std::optional<std::int64_t> executed = {},
                          Values noise = {}) {
    require_finite(window, "the observation window");
    const bool warm = warm_ && !state_.empty();
    ov::InferRequest& request = warm ? *warm_ : cold_;
    for (const auto& port : request.get_compiled_model().inputs()) {
      const std::string name = port.get_any_name();
      ov::Tensor input = request.get_tensor(port);
      if (name == "executed") {
        const auto steps = executed.value_or(static_cast<std::int64_t>(spec_.n_action_steps));
        input.data<std::int64_t>()[0] =
            std::clamp(steps, std::int64_t{0}, static_cast<std::int64_t>(spec_.horizon));
      } else if (name == "observation") {
        fill(input, window, name);
      } else if (name.rfind("last_", 0) == 0) {
        fill(input, state_.at(name), name);
      } else {
        if (!noise.count(name)) noise[name] = drawn(name, input.get_size());
        fill(input, noise[name], name);
      }
    }
    request.infer();
    for (const auto& port : request.get_compiled_model().outputs()) {
      const std::string name = port.get_any_name();
      if (name.rfind("next_", 0) == 0) state_["last_" + name.substr(5)] = copied(request.get_tensor(port));
    }
    std::vector<float> actions = copied(request.get_tensor("actions"));
    try {
      require_finite(actions, "the plan");
    } catch (...) {
      reset();  // what it continues may be the cause
      throw;
    }
    return actions;
  }

 private:
  std::vector<float> drawn(const std::string& name, std::size_t count) {
    std::vector<float> values(count);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform;
    for (float& value : values) value = name == "u" ? uniform(generator_) : normal(generator_);
    return values;
  }

  static void fill(ov::Tensor& input, const std::vector<float>& values, const std::string& name) {
    if (values.size() != input.get_size()) {
      throw std::invalid_argument(name + " has " + std::to_string(values.size()) + " numbers, expected " +
                                  std::to_string(input.get_size()));
    }
    std::copy(values.begin(), values.end(), input.data<float>());
  }

  static std::vector<float> copied(const ov::Tensor& tensor) {
    return {tensor.data<const float>(), tensor.data<const float>() + tensor.get_size()};
  }

  static void require_finite(const std::vector<float>& values, const char* what) {
    for (const float value : values) {
      if (!std::isfinite(value)) throw std::runtime_error(std::string(what) + " has NaN or infinity");
    }
  }

  Spec spec_{};
  std::mt19937_64 generator_;
  ov::InferRequest cold_;
  std::optional<ov::InferRequest> warm_;
  Values state_;  // of the last plan, by the name of the input that takes it
};

}  // namespace paradiffpolicy
