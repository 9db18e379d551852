# CUBINS_FOLDER: where cubins.S and cubins.inc are, or will be once they are built. Empty for none.
set(CUBINS_FOLDER "")

# The Python that compiles sees the site-packages of its installation and this source tree, nothing else: neither pip's
# isolated build environment, which hides them, nor an editable install of another tree.
function(find_compiling_python python path lacking)
  if(OPTIMIZE_PYTHON)
    set(found "${OPTIMIZE_PYTHON}")
  else()
    find_package(Python REQUIRED COMPONENTS Interpreter)
    set(found "${Python_EXECUTABLE}")
  endif()
  execute_process(COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONPATH "${found}" -c
      "import os, sysconfig; print(os.pathsep.join(dict.fromkeys(sysconfig.get_path(n) for n in ('purelib', 'platlib'))), end='')"
    OUTPUT_VARIABLE sites COMMAND_ERROR_IS_FATAL ANY)
  cmake_path(CONVERT "${CMAKE_SOURCE_DIR}/src" TO_NATIVE_PATH_LIST source)
  if(WIN32)
    set(both "${source};${sites}")
  else()
    set(both "${source}:${sites}")
  endif()
  execute_process(COMMAND ${CMAKE_COMMAND} -E env "PYTHONPATH=${both}" "${found}" -S -c
      "from importlib.util import find_spec; print(', '.join(n for n in ('torch', 'triton') if find_spec(n) is None), end='')"
    OUTPUT_VARIABLE without COMMAND_ERROR_IS_FATAL ANY)
  set(${python} "${found}" PARENT_SCOPE)
  set(${path} "${both}" PARENT_SCOPE)
  set(${lacking} "${without}" PARENT_SCOPE)
endfunction()

string(TOUPPER "${OPTIMIZE_CUBINS}" asked)
if(asked MATCHES "^(1|ON|YES|TRUE|AUTO)$")
  find_compiling_python(python path lacking)
  if(NOT lacking)
    set(CUBINS_FOLDER "${CMAKE_BINARY_DIR}/cubins")
    file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/kernels/*.py")
    add_custom_command(OUTPUT "${CUBINS_FOLDER}/cubins.S" "${CUBINS_FOLDER}/cubins.inc"
      COMMAND ${CMAKE_COMMAND} -E env "PYTHONPATH=${path}" "${python}" -S -m optimize.kernels.native_cubins
              ${OPTIMIZE_CUBINS_OPTIONS} "${CUBINS_FOLDER}"
      DEPENDS ${sources} COMMENT "Compiling Triton kernels" COMMAND_EXPAND_LISTS VERBATIM USES_TERMINAL)
  elseif(NOT asked STREQUAL "AUTO")
    message(FATAL_ERROR "OPTIMIZE_CUBINS: '${python}' has no ${lacking}, which compile the cubins; install them there, "
                        "name a Python that has them with OPTIMIZE_PYTHON, or build with OPTIMIZE_CUBINS=OFF")
  else()
    message(STATUS "OPTIMIZE_CUBINS: none, '${python}' has no ${lacking}")
  endif()
elseif(OPTIMIZE_CUBINS)
  get_filename_component(CUBINS_FOLDER "${OPTIMIZE_CUBINS}" ABSOLUTE BASE_DIR "${CMAKE_SOURCE_DIR}")
  if(NOT EXISTS "${CUBINS_FOLDER}/cubins.inc")
    message(FATAL_ERROR "OPTIMIZE_CUBINS: no cubins.inc in '${CUBINS_FOLDER}'; write it with "
                        "`python -m optimize.kernels.native_cubins ${CUBINS_FOLDER}`, or let this build do it: ON")
  endif()
endif()
